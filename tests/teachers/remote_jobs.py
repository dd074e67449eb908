"""What ranks do in the tests of remote teachers."""

import torch
import torch.distributed as dist
from tiny import VOCAB, make_rows

from largekd.contracts import SignalRequest, TopKRequest, VocabularyHead
from largekd.teachers.protocol import TeacherGoneError
from largekd.teachers.remote import Patience, RemoteTeacher
from largekd.teachers.remote_http import Replicas
from largekd.teachers.remote_own import OwnServers


def refused_signals(*, servers: list[str]) -> tuple[str, str]:
    """The error of a step where each rank asks a server of its own, and one of them is refused."""
    # That module imports this one.
    from teachers.test_remote_client import INFO

    replicas = Replicas(servers=(servers[dist.get_rank()],), token=None, timeout_s=5.0, retries=0)
    head = VocabularyHead(torch.zeros(VOCAB, INFO.width), VOCAB)
    source = OwnServers(replicas=replicas, info=INFO, head=head, shared_ids=VOCAB)
    teacher = RemoteTeacher(source, patience=Patience(wait_s=9.0))
    try:
        with teacher.signals(make_rows(count=2, packed=True), request=SignalRequest(TopKRequest(5))):
            return "none", ""
    except TeacherGoneError as error:
        return type(error).__name__, str(error)
