"""One serving process: accepting, connections, the turn, deadlines, drain, TLS, group commit."""
