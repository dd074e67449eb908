"""Rules about the addresses of a remote teacher."""

from collections.abc import Iterator

from largekd.config.addresses import address_problems
from largekd.config.teacher import RemoteTeacherConfig, TeacherConfig


def check_remote(teacher: TeacherConfig) -> Iterator[str]:
    """What is wrong with the servers of a remote teacher."""
    if not isinstance(teacher, RemoteTeacherConfig):
        return
    for index, server in enumerate(teacher.servers):
        yield from address_problems(
            server,
            place=f"teacher.servers.{index}",
            allow_remote=teacher.allow_remote,
            allow_key="teacher.allow_remote",
            token_key="token_variable",
        )
    if teacher.protocol == "vllm" and teacher.served_model is None:
        yield "teacher.served_model: an OpenAI-compatible server expects its model's name; set it"
