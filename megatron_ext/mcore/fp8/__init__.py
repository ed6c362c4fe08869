"""8-bit floating point on the torch backend: linear layers and routed experts whose matrix products run in fp8."""
