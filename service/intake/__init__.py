"""From a request to pixels, within bounds: whose it is, its body, its images."""
