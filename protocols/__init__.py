"""What is said: messages, wire frames, versions, errors."""
