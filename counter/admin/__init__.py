"""What a server tells over HTTP: health, the page, metrics; and the dump that a signal asks for."""
