"""The identity service over gRPC: clients renew their certificates here, by themselves."""

import asyncio

from lesft.identity.caller import Context, caller_of
from lesft.identity.certificates import der
from lesft.identity.security import Security
from lesft.v1 import identity_pb2, identity_pb2_grpc

SERVICE_NAME = identity_pb2.DESCRIPTOR.services_by_name["IdentityService"].full_name


class IdentityService(identity_pb2_grpc.IdentityServiceServicer):
    """On encrypted listeners of server and aggregator."""

    def __init__(self, security: Security) -> None:
        self._security = security

    async def Renew(
        self, request: identity_pb2.RenewRequest, context: Context
    ) -> identity_pb2.RenewResponse:
        """See identity.proto."""
        caller = caller_of(context)
        # In a thread: the registry waits for the disk.
        certificate = await asyncio.to_thread(
            self._security.renew, caller, request.certificate_request
        )
        return identity_pb2.RenewResponse(certificate=der(certificate))
