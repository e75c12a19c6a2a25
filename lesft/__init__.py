"""What the LESFT services share: wire codec, errors, channels, run spec, splitting, adapters."""
