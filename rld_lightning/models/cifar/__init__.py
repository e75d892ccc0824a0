"""Networks for images of 32 x 32, with the state_dict keys of the published teachers."""
