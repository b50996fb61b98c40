"""Reading, matching, editing, checking and printing FX graphs: the leftmost package, it imports nothing of fusionc."""
