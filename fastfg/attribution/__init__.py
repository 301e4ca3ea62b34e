"""Attribution: which patches of an image, and which SAE features, the model's output depends on."""
