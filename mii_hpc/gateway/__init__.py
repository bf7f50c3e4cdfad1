"""The OpenAI-compatible HTTP face of a deployment. Needs the extra `gateway`; loads no torch."""
