"""Where parameters, states and gradients live."""
