"""Parse requests as the server does, for a model without weights."""

from google.protobuf import json_format
from model_info import LIMITS, MODEL_INFO

from server.api import requests
from server.domain import ModelInfo
from server.engine.interface import NOBODY
from server.settings import Settings
from text_to_image_client.v1 import text_to_image_pb2 as pb


def parse(text: str, info: ModelInfo = MODEL_INFO) -> requests.ParsedRequest:
    message = json_format.Parse(text, pb.GenerateRequest())
    return check(message, info, requests.limits_of(info, Settings()))


def check(
    message: pb.GenerateRequest, info: ModelInfo = MODEL_INFO, limits: requests.RequestLimits = LIMITS
) -> requests.ParsedRequest:
    return requests.parse(message, requests.request_id_of(message), info, limits, NOBODY, draw_seed=lambda: 7)
