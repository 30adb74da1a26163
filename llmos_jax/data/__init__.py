"""From text to packed rows of tokens on the device."""
