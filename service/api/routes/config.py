"""On the admin port: GET /config, the settings as they are and where they came from."""

import re
from typing import Any, Final

from fastapi import APIRouter

from service.api.schemas import ConfigAnswer, SettingAnswer
from service.api.security import GuardedRoute, open_to
from service.services import Parts
from service.settings import Settings

router = APIRouter(route_class=GuardedRoute)

# Of a URL all that may hold a password: what stands before its host, and its query. Rather too much than too little.
_CREDENTIALS: Final = re.compile(r"(?<=://).*@|(?<=\?).*", re.DOTALL)


@router.get(
    "/config",
    response_model=ConfigAnswer,
    summary="The settings in force, and where each came from",
    openapi_extra=open_to("admin"),
)
async def get_config(parts: Parts) -> Any:
    """Every setting; credentials in URLs are shown as ***."""
    return _describe(parts.settings)


def _describe(settings: Settings) -> ConfigAnswer:
    values, sources = settings.model_dump(mode="json"), settings.sources()
    return ConfigAnswer(
        settings=[
            SettingAnswer(variable=f"CANDLECAST_{name.upper()}", value=_shown(values[name]), source=source)
            for name, source in sources.items()
        ]
    )


def _shown(value: Any) -> Any:
    if not isinstance(value, str) or "://" not in value:
        return value
    return _CREDENTIALS.sub(lambda found: "***@" if found[0].endswith("@") else "***", value)
