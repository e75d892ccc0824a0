"""Networks for 224 x 224 images that torchvision and timm lack in the form that the literature trains."""
