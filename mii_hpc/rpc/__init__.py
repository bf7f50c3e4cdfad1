"""What processes say to each other, and how: messages, errors, and TLS channels."""
