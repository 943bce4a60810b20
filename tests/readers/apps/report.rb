# frozen_string_literal: true

# What the Ruby readers have in common: the report of one request, as every reader of this folder makes it.
#
# X-Seen of the answer: {"m": method that the application acts on, "h": the token header, "x": [[header, value]] of other
# headers that say who acts or how, "s": [[source, name, value]] of the watched parameters, "n": fields read from the body,
# "e": the error that ends the request for this application, or null}. A value that is no string is {"odd": ...}.
# X-Path of the answer: the path that the application's routes are matched with, other bytes than visible ASCII as %XX.
# Reports that hold anything go to the file READER_LOG as well, because the answer of a request that the gateway breaks
# off never arrives.

require 'json'

module Report
  NAMES = %w[private_token sudo access_token bearer_token job_token _method page per_page].freeze
  OTHERS = %w[AUTHORIZATION SUDO JOB_TOKEN DEPLOY_TOKEN X_HTTP_METHOD_OVERRIDE COOKIE].freeze
  LOG = File.open(ENV.fetch('READER_LOG'), 'a').tap { |file| file.sync = true }

  def self.value(value)
    return { odd: value.inspect.b[0, 100].force_encoding(Encoding::UTF_8).scrub } unless value.is_a?(String)

    text = value.b[0, 100].force_encoding(Encoding::UTF_8)
    text.valid_encoding? ? text : { odd: text.b.inspect }
  end

  def self.path(env)
    env['PATH_INFO'].b.gsub(/[^\x21-\x7e]/n) { |byte| format('%%%02X', byte.ord) }
  end

  # The watched names of a hash of parameters.
  def self.pick(source, params)
    return [] unless params.is_a?(Hash)

    NAMES.reject { |name| params[name].nil? }.map { |name| [source, name, value(params[name])] }
  end

  def self.json(body)
    JSON.parse(body)
  rescue StandardError
    nil
  end

  def self.make(env, method, seen, fields, error)
    others = OTHERS.filter_map { |name| [name, value(env["HTTP_#{name}"])] if env["HTTP_#{name}"] }
    report = { m: method, h: env['HTTP_PRIVATE_TOKEN'] && value(env['HTTP_PRIVATE_TOKEN']), x: others, s: seen, n: fields,
               e: error && value("#{error.class}: #{error.message}") }
    text = JSON.generate(report, ascii_only: true)
    LOG.write("#{JSON.generate({ id: env['HTTP_X_REQUEST_ID'], r: report }, ascii_only: true)}\n") unless seen.empty?
    text
  end
end
