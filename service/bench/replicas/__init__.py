"""How soon several replicas answer with what was changed on one of them."""
