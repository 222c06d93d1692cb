"""Full names of the gRPC services that this server can serve, and of their methods."""

from server.stubs.inference_v2 import open_inference_pb2 as oip
from server.stubs.model_model_v1alpha import model_public_pb2 as model_public
from server.stubs.model_ray_v1alpha import user_defined_pb2 as user_defined
from text_to_image_client.v1 import text_to_image_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["TextToImageService"].full_name
INSTILL = user_defined.DESCRIPTOR.services_by_name["UserDefinedService"].full_name
INSTILL_PUBLIC = model_public.DESCRIPTOR.services_by_name["ModelPublicService"].full_name
KSERVE = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

METHODS = frozenset(
    f"/{service.full_name}/{method.name}"
    for file in (pb.DESCRIPTOR, user_defined.DESCRIPTOR, model_public.DESCRIPTOR, oip.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
)
"""Paths of all methods, as in "/text_to_image.v1.TextToImageService/Generate"."""
