# frozen_string_literal: true

# Reader: a Grape API that takes JSON unless told otherwise, behind Rack::MethodOverride, as GitLab mounts its own.

require 'grape'
require_relative 'report'

class Reader < Grape::API
  default_format :json
  content_type :json, 'application/json'
  content_type :txt, 'text/plain'

  rescue_from :all do |e|
    seen = Report.make(env, env['REQUEST_METHOD'], [], 0, e)
    error!({ message: 'an error' }, 400, { 'X-Seen' => seen })
  end

  route :any, '*path' do
    # A route of its own gives `path`; the query gives what it gives.
    query = Rack::Utils.parse_nested_query(env['QUERY_STRING'])
    fields = params.keys.count { |name| name != 'path' && !query.key?(name) }
    from_query, from_body = Report.pick('params', params.to_h).partition { |_, name, _| query.key?(name) }
    from_query.each { |seen| seen[0] = 'query' }
    from_body.each { |seen| seen[0] = 'body' }
    header 'X-Seen', Report.make(env, env['REQUEST_METHOD'], from_query + from_body, fields, nil)
    header 'X-Path', Report.path(env)
    status 200
    {}
  end
end

use Rack::MethodOverride
run Reader
