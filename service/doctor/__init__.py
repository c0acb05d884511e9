"""A doctor for servers: looks at running ones from outside, and changes nothing of them.

Light to import: no torch. Every check sends real requests and judges real answers.
"""
