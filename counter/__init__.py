"""The counter: everything behind the two commands, one package a trade, imports downwards only."""
