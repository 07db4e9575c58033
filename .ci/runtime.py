"""Print ``name==version`` of everything that installing esegeta-monai brings, as it is in this environment."""

from __future__ import annotations

from importlib.metadata import distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def collect(name: str, found: dict[str, str]) -> None:
    """Add the packages that ``name`` requires without extras, and theirs."""
    for text in distribution(name).requires or []:
        requirement = Requirement(text)
        key = canonicalize_name(requirement.name)
        if key not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found[key] = distribution(key).version.partition("+")[0]  # a local build (+cpu) is on no index
            collect(key, found)


if __name__ == "__main__":
    found: dict[str, str] = {}
    collect("esegeta-monai", found)
    print("\n".join(f"{name}=={version}" for name, version in sorted(found.items())))
