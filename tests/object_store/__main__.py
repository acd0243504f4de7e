"""A server of Google Cloud Storage's JSON API, in memory, on this host.

    python tests/object_store PORT

It is gcp-storage-emulator, and what that lacks and TensorStore needs to rewrite
a file that others may rewrite, too: preconditions, and in each answer the
generation of the object.
"""

import functools
from http import server as http_server
import sys
import threading

from gcp_storage_emulator import exceptions
from gcp_storage_emulator import server
from gcp_storage_emulator import storage as storage_lib
from gcp_storage_emulator.handlers import buckets

BUCKET = 'bucket'
NONE = '0'  # the generation, in preconditions, of what is not there
# The emulator would answer as if they were not there.
UNKNOWN = (
  'endOffset',
  'ifMetagenerationMatch',
  'ifMetagenerationNotMatch',
  'startOffset',
)
LOCK = threading.Lock()  # a precondition holds until its write is done


def checked(handler):
  """The handler of a request, behind its preconditions."""

  @functools.wraps(handler)
  def handle(request, response, storage):
    content = request.data  # before any answer: what is sent has to be read
    name = _object_name(request, content)
    query = {key: values[0] for key, values in request.query.items()}
    with LOCK:
      response.status = _refusal(query, _generation(request, storage, name))
      if response.status is not http_server.HTTPStatus.OK:
        return
      handler(request, response, storage)
      generation = _generation(request, storage, name)
      if generation != NONE:
        response['x-goog-generation'] = generation

  return handle


def _object_name(request, content) -> str:
  """The object that a request is about; '' if it is about none."""
  found = request.params.get('object_id') or request.query.get('name', [''])[0]
  if not found and isinstance(content, dict):
    found = content.get('meta', content).get('name', '')
  return found


def _generation(request, storage, name: str) -> str:
  """That of an object; NONE if it is not there."""
  try:
    there = storage.get_file_obj(request.params['bucket_name'], name)
  except (KeyError, exceptions.NotFound):
    return NONE
  return there['generation']


def _refusal(query, generation: str) -> http_server.HTTPStatus:
  """What a request gets instead of an answer; OK if nothing speaks against."""
  if any(key in query for key in UNKNOWN):
    return http_server.HTTPStatus.NOT_IMPLEMENTED
  if query.get('generation', generation) != generation:
    return http_server.HTTPStatus.NOT_FOUND
  if query.get('ifGenerationMatch', generation) != generation:
    return http_server.HTTPStatus.PRECONDITION_FAILED
  if query.get('ifGenerationNotMatch') == generation:
    return http_server.HTTPStatus.NOT_MODIFIED
  return http_server.HTTPStatus.OK


class Server(http_server.ThreadingHTTPServer):
  """Many requests at once, as TensorStore sends them."""

  request_queue_size = 128


def main(port: int) -> None:
  server.HANDLERS = tuple(
    (path, {method: checked(f) for method, f in methods.items()})
    for path, methods in server.HANDLERS
  )
  storage = storage_lib.Storage(use_memory_fs=True)
  buckets.create_bucket(BUCKET, storage)
  handler = functools.partial(server.RequestHandler, storage)
  Server(('localhost', port), handler).serve_forever()


if __name__ == '__main__':
  main(int(sys.argv[1]))
