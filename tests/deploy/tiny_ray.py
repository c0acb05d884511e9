"""The Ray Serve application with the tiny backbone instead of the one that settings name."""

from __future__ import annotations

from fastapi import FastAPI

from service import ray_app


def make_app() -> FastAPI:
    from tests.models import tiny_backbone

    return ray_app.make_app(tiny_backbone())


app = ray_app.application(make_app)
