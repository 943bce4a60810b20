# frozen_string_literal: true

# Tells, for any request, what Rack makes of it and what GitLab 8.x would do with that. The differential tests send
# thousands of odd requests here and compare with what tollgate decided. Plain Rack, because it must be fast.
# Start: puma -b tcp://127.0.0.1:PORT -t 4:8 -w 0 --quiet -e production tests/backend/rack_probe.ru
#
# Always 200. "error" is set when Rack raises on the parameters; everything that comes from them is null then.
# JSON bodies are no parameters here: Grape reads those, Rack doesn't.

require 'json'
require_relative 'printable'

# Kaminari's arithmetic in GitLab 4.0 to 8.14: whatever to_i makes of it, at least 1 ...
def effective_page(value)
  [value.to_i, 1].max
rescue NoMethodError # arrays, hashes and uploaded files have no to_i
  'error'
end

# ... and 20 in place of zero and below, 100 at most.
def effective_per_page(value)
  number = value.to_i
  number.positive? ? [number, 100].min : 20
rescue NoMethodError
  'error'
end

def from_params(params, env)
  param = params['private_token']
  # Not nil: the parameter wins, wrong and empty ones too.
  effective = param.nil? ? env['HTTP_PRIVATE_TOKEN'] : param.to_s
  {
    param: printable(param), effective: printable(effective),
    page: printable(params['page']), page_i: effective_page(params['page']),
    per_page: printable(params['per_page']), per_page_i: effective_per_page(params['per_page']),
    sudo: printable(params['sudo']), access_token: printable(params['access_token']),
    bearer_token: printable(params['bearer_token']), error: nil
  }
end

NO_PARAMS = %i[param effective page page_i per_page per_page_i sudo access_token bearer_token].to_h { |key| [key, nil] }

def report(env)
  parsed = begin
    from_params(Rack::Request.new(env).params, env)
  rescue StandardError => e
    NO_PARAMS.merge(error: printable("#{e.class}: #{e.message}".b))
  end
  parsed.merge(
    header: printable(env['HTTP_PRIVATE_TOKEN']), sudo_header: printable(env['HTTP_SUDO']),
    authorization: printable(env['HTTP_AUTHORIZATION']), method: env['REQUEST_METHOD'],
    path: printable(env['PATH_INFO']), query: printable(env['QUERY_STRING'])
  )
end

# As Rails has it: on POST, X-HTTP-Method-Override and a form's `_method` say what is run.
use Rack::MethodOverride
run ->(env) { [200, { 'Content-Type' => 'application/json' }, [JSON.generate(report(env))]] }
