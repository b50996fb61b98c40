"""Random torch programs compiled by fusionc and compared with eager."""
