"""A better adapter in the place of an older one: the exchange, and the report about it."""
