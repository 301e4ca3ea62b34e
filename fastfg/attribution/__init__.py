"""Attribution: which patches, and which features, a model's output rests on."""
