"""TLS without sockets, and certificates as they were at one moment."""
