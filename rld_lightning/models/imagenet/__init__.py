"""Networks for images of 224 x 224 that torchvision and timm do not have as the literature trains them."""
