"""The passes of the compiler: one verb each, from one frozen value to the next."""
