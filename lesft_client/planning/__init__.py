"""`lesft-client plan`: where to cut the model, measured on this device and its link."""
