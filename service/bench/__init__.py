"""`medley bench serve`: open-loop load on a real server, beside a bare loop and beside infinity."""
