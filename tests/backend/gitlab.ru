# frozen_string_literal: true

# A backend that behaves like GitLab CE 8.x behind /api/v3, and like a later one behind /api/v4, for the tests that run tollgate in front of something real.
# Start: BACKEND_TOKENS=token=user,token=user puma -b tcp://127.0.0.1:PORT -t 4:8 -w 0 --quiet -e production tests/backend/gitlab.ru
# One process (-w 0), because projects, issues and the request log live in memory.

require_relative 'gitlab'

use Backend::Seen
# Not Rack's `map`: that one rewrites PATH_INFO, and the point here is what arrives untouched.
run Backend
