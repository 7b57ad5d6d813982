"""The HTTP API, in OpenAI's shapes, and the web page."""
