"""The process's limit of open files."""

import logging
import resource

logger = logging.getLogger(__name__)


def claim_descriptors(wanted: int, max_connections: int) -> None:
    """Raise the limit of open files to `wanted`; warn if the hard limit is lower.

    `wanted` is the sum of what `max_connections` and the backend need.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        logger.warning(
            "at most %d files may be open here (ulimit -n), and --max_connections=%d"
            " with what the backend needs takes %d",
            hard,
            max_connections,
            wanted,
        )
        wanted = hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
