"""The load generator: a run, its processes and connections, the schedule, the recording."""
