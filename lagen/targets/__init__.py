"""Where kernels go: descriptions of devices, the launches of a program on them, and cross-compilation without the device."""
