"""What Linux gives: limits, sockets, the service manager, streams. It knows no counting."""
