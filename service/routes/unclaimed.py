"""`/v1/unclaimed`: the sample of images that no task claims. Users' images: admin key only."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Path, Response

from service.state import CurrentService
from service.wire.openapi import PROBLEM_RESPONSES
from service.wire.signal_schemas import UnclaimedAnswer, UnclaimedImage

__all__ = ["routes"]

routes = APIRouter(prefix="/v1/unclaimed", tags=["signals"], responses=PROBLEM_RESPONSES)
ImageId = Annotated[str, Path(pattern=r"^[0-9]{1,20}$")]
HEADERS = {  # whatever the file holds, no browser shows it here, and nobody keeps it by the way
    "X-Content-Type-Options": "nosniff",
    "Content-Disposition": "attachment",
    "Cache-Control": "no-store",
}


@routes.get("")
async def list_unclaimed(service: CurrentService) -> UnclaimedAnswer:
    """List what is in the sample."""
    reservoir = service.reservoir
    kept = [UnclaimedImage(**asdict(one)) for one in await reservoir.kept()]
    return UnclaimedAnswer(limit=reservoir.images, seen=reservoir.seen, images=kept)


@routes.get(
    "/{image}",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
async def get_unclaimed(image: ImageId, service: CurrentService) -> Response:
    """One image of the sample, as its client sent it."""
    data = await service.reservoir.read(image)
    return Response(data, media_type="application/octet-stream", headers=HEADERS)


@routes.delete("/{image}", status_code=204)
async def forget_unclaimed(image: ImageId, service: CurrentService) -> None:
    """Forget one image."""
    await service.reservoir.remove(image)


@routes.delete("", status_code=204)
async def forget_all_unclaimed(service: CurrentService) -> None:
    """Forget all images of the sample, and begin a new one."""
    await service.reservoir.clear()
