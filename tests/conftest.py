"""What every test finds."""

import signal

# Under nohup, as some runners of CI start it, a suite ignores SIGHUP, and so would all that it
# starts.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
