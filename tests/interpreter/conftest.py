"""These tests run the GPU kernel in Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest tests/interpreter`.

They need a process of their own. Triton reads the variable when a kernel, its own library's included, is decorated, and
a kernel decorated for the interpreter can no longer be compiled.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
