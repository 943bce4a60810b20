# frozen_string_literal: true

# Reader: a plain Rack application behind Rack::MethodOverride. It reads parameters as Rack does, and JSON as Grape 0.2
# (GitLab 4) does: in any body, whatever its type and method.

require 'rack'
require_relative 'report'

use Rack::MethodOverride
run lambda { |env|
  request = Rack::Request.new(env)
  seen = []
  fields = 0
  error = nil
  begin
    form = request.POST
    seen = Report.pick('query', request.GET) + Report.pick('form', form)
    # What an application asks for. It differs from the two where a parameter of one name is in both.
    seen += Report.pick('params', request.params) if seen.empty?
    fields = form.size
    env['rack.input'].rewind
    json = Report.json(env['rack.input'].read)
    seen += Report.pick('json', json)
    fields += json.size if json.is_a?(Hash)
  rescue StandardError => e
    error = e
    seen = []
  end
  head = { 'Content-Type' => 'application/json', 'X-Seen' => Report.make(env, env['REQUEST_METHOD'], seen, fields, error),
           'X-Path' => Report.path(env) }
  [200, head, ['{}']]
}
