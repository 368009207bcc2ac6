"""Is a recorded history exact? Pure: no socket, no clock, no process."""
