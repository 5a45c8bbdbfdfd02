# The smallest backend in Django, as one file: it answers each message in the response.
#
#     .venv/bin/python -m pip install django
#     .venv/bin/python examples/reply_django.py runserver --noreload 8000
#     .venv/bin/socketdock --backend=http --messageuri=http://127.0.0.1:8000/message
import json

from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt


def message(request: HttpRequest) -> JsonResponse:
    commands = [{"send": f"you said: {json.loads(request.body)['message']}"}]
    content_type = "application/vnd.socketdock+json"
    return JsonResponse({"commands": commands}, content_type=content_type)


urlpatterns = [path("message", csrf_exempt(message))]
settings.configure(ROOT_URLCONF=__name__, DATA_UPLOAD_MAX_MEMORY_SIZE=32 * 2**20,
                   ALLOWED_HOSTS=["127.0.0.1"])
execute_from_command_line()
