"""Networks for 32 x 32 images, with the state_dict keys of the published teachers."""
