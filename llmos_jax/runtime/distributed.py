"""Starting a process: its place among the others, where compiled programs are kept."""

import os
import sys
from typing import Any

import jax

from llmos_jax.config import UserError, home

ENVIRONMENT = ("LLMOS_COORDINATOR", "LLMOS_NUM_PROCESSES", "LLMOS_PROCESS_ID")


def start() -> None:
    """Joins the other processes where the environment says there are some; call it before anything touches a device.

    LLMOS_COORDINATOR (host:port), LLMOS_NUM_PROCESSES and LLMOS_PROCESS_ID name this process; LLMOS_DISTRIBUTED=1
    lets jax find all three itself, as on TPU VMs. Raises UserError where only some are set or the others do not come.
    """
    cache_programs()
    given = [name for name in ENVIRONMENT if os.environ.get(name)]
    if not given and os.environ.get("LLMOS_DISTRIBUTED", "") != "1":
        return
    if given and len(given) < len(ENVIRONMENT):
        missing = ", ".join(name for name in ENVIRONMENT if name not in given)
        raise UserError(f"{' and '.join(given)} is set but not {missing}; set all three, or none for a single process")
    options: dict[str, Any] = {}
    if given:
        coordinator, *numbers = (os.environ[name] for name in ENVIRONMENT)
        if not all(number.isdigit() for number in numbers):
            raise UserError(f"LLMOS_NUM_PROCESSES and LLMOS_PROCESS_ID are whole numbers, not {' and '.join(numbers)}")
        num_processes, process_id = map(int, numbers)
        if process_id >= num_processes:
            raise UserError(f"LLMOS_PROCESS_ID={process_id} must be below LLMOS_NUM_PROCESSES={num_processes}")
        options = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    if "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        _keep_answers_clean()
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        where = options.get("coordinator_address", "the coordinator")
        raise UserError(f"the other processes were not reached at {where}: {error}") from error


def _keep_answers_clean() -> None:
    """Sends what libraries write to standard output to standard error; Python's own `print` stays where it was.

    Gloo tells of its connections on standard output, where a command's answer belongs.
    """
    sys.stdout.flush()
    answers = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(answers, "w", encoding=sys.stdout.encoding)


def cache_programs() -> None:
    """Keeps compiled programs on disk between processes, in $LLMOS_HOME/programs unless jax was told a place."""
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(home() / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def is_primary() -> bool:
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here; nothing with a single one."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
