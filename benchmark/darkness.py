"""A reward of small spread that does not saturate, for toy_mnist_flow.py and adrpo_fm_sd3.py:

python toy_mnist_flow.py --reward benchmark/darkness.py:darkness --methods adrpo --beta0 1
"""


def darkness(images, prompts, metadata):
    """1 - mean brightness of each image: images float [B,C,H,W] in [0,1] -> [B]."""
    return 1 - images.mean(dim=(1, 2, 3))
