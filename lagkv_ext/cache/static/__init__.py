"""``LagKVStaticCache``: memory of a fixed size at fixed addresses."""
