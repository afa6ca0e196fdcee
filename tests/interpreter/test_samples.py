"""The kernel that samples words, in the interpreter."""

from __future__ import annotations

import torch

from fusedfog.kernels import samples


def test_words_are_kept_and_blocks_with_others_counted() -> None:
    flats = [torch.randn(5000), torch.randn(3000).bfloat16()]
    flats[0][17] = float("nan")
    places = [torch.randint(0, flat.numel() * flat.element_size() // 2, (samples.BLOCK * 2,)) for flat in flats]
    addresses = torch.cat([at * 2 + flat.data_ptr() for at, flat in zip(places, flats, strict=True)])
    seen, edits = torch.zeros(len(addresses), dtype=torch.int16), torch.zeros(4)

    def launch(compare: bool) -> None:
        samples.sample_words[(4,)](addresses, seen, edits, COMPARE=compare, BLOCK=samples.BLOCK)

    launch(False)
    words = [flat.view(torch.int16)[at] for at, flat in zip(places, flats, strict=True)]
    assert torch.equal(seen, torch.cat(words))
    launch(True)
    assert edits.tolist() == [0.0] * 4
    flats[1].view(torch.int16)[places[1][-1]] += 1
    launch(True)
    launch(True)
    assert edits.tolist()[:2] == [0.0, 0.0] and edits[3] == 2.0
    launch(False)
    launch(True)
    assert edits[3] == 2.0
