"""Below a path of somebody else's site: what a proxy left in front of the paths is taken off.

A proxy that takes it off itself needs none of this: every address that the service gives out is relative.
"""

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class Prefix:
    """Outermost, so that everything within knows one name for each path. Requests without the prefix pass as well."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self.app, self.prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope.get("path", "")
        if path == self.prefix and scope["type"] == "http":  # the page's own addresses are relative to a folder
            await RedirectResponse(f"{self.prefix}/")(scope, receive, send)
        elif path.startswith(f"{self.prefix}/"):
            await self.app({**scope, "path": path.removeprefix(self.prefix)}, receive, send)
        else:
            await self.app(scope, receive, send)
