"""What a delta costs: to find it, on the wire, and to write it where it belongs."""
